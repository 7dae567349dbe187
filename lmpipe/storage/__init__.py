"""Files that survive a kill: the run store, what it is made of, and the hashes by which its content is found."""
