"""A store that is a directory: ordinary files that restore without vmbackup."""
