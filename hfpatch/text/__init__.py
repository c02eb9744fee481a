"""Texts for prompts: the built-in grammar and prose, splitting into sentences, prompts as token ids."""
