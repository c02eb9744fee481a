"""Recipes shipped with hfpatch, one YAML per question a user has."""
