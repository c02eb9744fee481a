"""Command line options that several calibrations share."""

from typing import Annotated

import typer

from ..cli.options import number

DATA = (
    "JSON lines with prompt, answer and labels, or with texts and labels, as a CSV or TSV file may have; a Hub data "
    "set; 'sentiment' or 'subject', sentences that hfpatch ships; or 'embedded'."
)
Data = Annotated[str, typer.Option(help=DATA)]
Split = Annotated[str, typer.Option(help="Split of a Hub data set.")]
Prompt = Annotated[str, typer.Option(help="Prompt template over the fields of a Hub data set or of a file of texts.")]
Answer = Annotated[str, typer.Option(help="Field with the label.")]
Names = Annotated[str, typer.Option(help="Label texts by number, separated by commas.")]
Count = Annotated[int, number("Examples to use; half are held out.", 8)]
Shots = Annotated[int, number("Labelled texts per prompt, where prompts are made here.", 0, 100)]
Renamed = Annotated[bool, typer.Option("--renamed", help="Embedded task with topics called by other words.")]
Batch = Annotated[int, number("Prompts per forward pass.", 1)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew instead of continuing a run in the folder.")]
