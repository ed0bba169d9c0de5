"""Writing a selection in the form that another tool reads.

An export is a folder: the files of a format, `provenance/` with where every sample comes from, and
`export.json`, which is complete when all the rest is. It is cut into **shards** of consecutive
parts of the selection. A shard is made in a temporary folder and copied; then its receipt is
written, and an export that was interrupted goes on after the shards that have one.

A format is one class in a file here, and a line in `formats.FORMATS`.
"""
