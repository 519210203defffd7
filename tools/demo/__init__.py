"""The pipeline of `beam_demo.py`: what is to run, the models, the pipeline itself, and who watches it."""
