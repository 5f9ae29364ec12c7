"""The commands: what a person or `ray job submit` starts."""
