"""Conversion of trained models into other forms of this network: `python -m model.convert`."""
