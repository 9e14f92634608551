"""The model as mathematics: pure functions on plain pytrees, with no files, options or threads in sight."""
