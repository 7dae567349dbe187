"""Text at the edges of the library: cleaned on the way in, made safe for messages and terminals on the way out."""
