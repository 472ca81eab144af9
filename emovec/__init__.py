"""emovec: read and steer emotion concepts inside language models."""
