"""Side-by-side runs against what a user would pick instead; ``results/`` holds what they measured."""
