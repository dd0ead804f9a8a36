"""`fuseport convert --report`: what a conversion did, as a page of HTML with pictures."""
