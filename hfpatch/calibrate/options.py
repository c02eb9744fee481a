"""Command line options that several calibrations share."""

from typing import Annotated

import typer

from ..cli.options import number

Data = Annotated[str, typer.Option(help="JSON lines with prompt, answer and labels; a Hub data set; or 'embedded'.")]
Split = Annotated[str, typer.Option(help="Split of a Hub data set.")]
Prompt = Annotated[str, typer.Option(help="Prompt template over a Hub data set's fields.")]
Answer = Annotated[str, typer.Option(help="Field of a Hub data set with the label.")]
Names = Annotated[str, typer.Option(help="Label texts by number, separated by commas.")]
Count = Annotated[int, number("Examples to use; half are held out.", 8)]
Shots = Annotated[int, number("Labelled texts per prompt of the embedded task.", 0, 100)]
Renamed = Annotated[bool, typer.Option("--renamed", help="Embedded task with topics called by other words.")]
Batch = Annotated[int, number("Prompts per forward pass.", 1)]
Fresh = Annotated[bool, typer.Option("--fresh", help="Begin anew instead of continuing a run in the folder.")]
