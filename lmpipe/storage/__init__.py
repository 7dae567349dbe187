"""Files that survive a killed process: the run store, its journal and blobs, and the digests that identify content."""
