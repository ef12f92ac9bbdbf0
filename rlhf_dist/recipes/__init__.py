"""One file per job; each reads like its algorithm."""
