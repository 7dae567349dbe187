"""Text that enters the library is cleaned; text that leaves it is made safe for messages, terminals and Markdown."""
