"""Models for other programs: weights of other codes, folders of Hugging Face, ``torch.export`` and ONNX."""
