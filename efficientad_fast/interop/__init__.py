"""Models made elsewhere: read without running what is in their files, and running models of anomalib.

`unpickling` and `reading` make tensors of what ``torch.save`` wrote; `networks` recognises them; `fork` and `anomalib`
know what each of the two writes beside them; `loading` finds out which it is and supplies what is missing;
`accelerate` lets a model of anomalib predict by this package's plans.
"""
