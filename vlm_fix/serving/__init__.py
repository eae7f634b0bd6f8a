"""The methods inside vLLM: the same classes, on the rows of a paged batch.

`plugin` is what vLLM finds by its entry point; `settings` and `options` are what a server and a request ask for; `refusals` says
what cannot be served; `worker` follows the requests of one worker, `groups` are their rows in one step, `backend` writes the
edited rows over those of vLLM's attention, `beside` runs a prompt or a second branch beside the batch, `logits` is what
happens to the next-token distribution, `tower` what happens to the images.
"""
