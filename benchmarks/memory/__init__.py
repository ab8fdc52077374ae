"""Predicted against measured memory, configuration by configuration."""
