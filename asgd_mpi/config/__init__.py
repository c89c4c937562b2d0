"""Every option, every default, every refusal of a combination, and which rank does what."""
