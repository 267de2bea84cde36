"""The model: parameters and layers, on tokens of any layout (spec/model.md)."""
