"""Train with Lightning: `python train.py fit --config configs/reference/deit_tiny_scenes.yaml`."""

from vistoken.cli.train import main

if __name__ == "__main__":
    main()
