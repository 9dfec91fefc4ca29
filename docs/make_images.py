"""Draw the pictures of the documentation that need no training: python docs/make_images.py."""

from pathlib import Path

from em_lightning.plots import activation_gallery, save_figure

if __name__ == "__main__":
    print(save_figure(activation_gallery(), Path(__file__).parent / "images" / "activations.png"))
