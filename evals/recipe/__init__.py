"""Recipes: YAML read strictly, checked against the schema, and built into a run."""

from .recipe import find_recipe as find_recipe
from .recipe import list_recipes as list_recipes
from .recipe import load_recipe as load_recipe
from .recipe import validate as validate
