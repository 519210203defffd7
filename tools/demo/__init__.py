"""The pipeline of `beam_demo.py`: the plan of a run, the models, the pipeline itself, and its watcher."""
