"""Speeds as ratios within one run: seconds differ between machines and minutes, ratios much less."""
