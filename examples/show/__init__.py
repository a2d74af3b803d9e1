"""The demo around the project: its input, its worker, the accident, and the proof at the end."""
