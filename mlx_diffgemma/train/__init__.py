"""Fine-tuning: the noising, the objective, the loop, and the adapters it writes."""
