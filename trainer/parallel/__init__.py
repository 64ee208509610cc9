"""The only package that knows how many ranks there are: nothing else imports deepspeed or torch.distributed."""
