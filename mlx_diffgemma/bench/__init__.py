"""How fast is it, where does the time go, and how far is that from the floor?"""
