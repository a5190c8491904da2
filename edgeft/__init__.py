"""edgeft: did the benefit of fine-tuning survive deployment?"""

__version__ = "0.1.0"
