"""What a person sees of a run: formats (human.py), sums over its events (summary.py), the terminal (terminal.py)."""
