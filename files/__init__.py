"""Files on disk, for every room: written whole or not at all."""
