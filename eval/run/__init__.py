"""Run the model: plan runs, generate answers, keep them on disk and summarise them."""
