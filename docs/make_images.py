"""Draw the figures of the documentation that need no training: python docs/make_images.py [FOLDER]."""

import sys
from pathlib import Path

from em_lightning.plots import activation_gallery, save_figure

if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "images"
    print(save_figure(activation_gallery(), folder / "activations.png"))
