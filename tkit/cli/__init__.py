"""Parse, call one stage, print its record. The only package that prints and exits."""
