"""The papers' tables, measured: each *.yaml here says which rows and columns make one.

published.py    the papers' figures (dinobench/published.csv)
definition.py   a table: rows, columns, scales
cells.py        what has to be trained and measured for them, each thing once
records.py      one file per trained cell, from which the tables are written
plan.py         which cells there are, what they need and how long they take
worker.py       one cell, from recipe to record
runner.py       many cells: local processes, or jobs of a SLURM array
contents.py     records and published figures side by side: means, differences, verdicts
writing.py      Markdown, CSV and LaTeX of a table, and the index
drawing.py      its picture
retrain.py      a cell of the committed records trained again
"""
