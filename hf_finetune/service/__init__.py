"""The service: a durable fine-tuning API on one's own hardware. Needs `pip install 'hf-finetune[service]'`."""
