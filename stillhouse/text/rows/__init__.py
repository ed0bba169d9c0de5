"""Readers of files of rows, a format a module; `stillhouse.text.formats` lists them."""
