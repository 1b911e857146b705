"""The kubectl plugin as krew takes it: an archive with a zipapp, and the manifest that names it."""
