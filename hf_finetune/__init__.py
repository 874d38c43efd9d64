"""Fine-tunes Hugging Face classifiers and LLMs from one YAML recipe."""

__version__ = "0.1.0"

__all__ = ["__version__"]
