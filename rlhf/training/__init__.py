"""What the trainings of sft, reward and ppo share: devices, processes, checkpoints of a Hugging Face Trainer.

May import context, config, models and what lies below them; no stage.
"""
