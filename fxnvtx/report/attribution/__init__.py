"""Which range launched what: the rows of a capture as numpy columns, joined and nested a window at a time.

Nothing here is imported before a capture is read, because numpy is not needed for anything else. Data flows through
`batches` (rows out of SQLite), `spool` (sorted runs, in memory or in a temporary file), `names`, `device` (credit of
each operation, and its call), `nesting` or `crossing` (the range around each call), `threads` (one thread after
another) and `forest` (counters per path), which fills the `Tree` that every view reads. `captures` puts them together
for the exports of Nsight Systems, `recorded` for recordings.
"""
