"""What language models are made of here: chats and their trained tokens, packing, token losses, generated answers."""
