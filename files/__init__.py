"""Files on disk, for every room: whole-file writing, locks, and reading of untrusted files."""
