"""The demo around the project: its input, its worker processes, the accident, and the proof at the end."""
