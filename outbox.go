package raft

// outbox holds messages and replies until what they claim is durable. It is
// pure: the server and the simulator drive the same one, so the promise that
// nothing leaves before what it claims lives in tested code.
type outbox struct {
	waiting []message
}

func (o *outbox) add(msgs []message) { o.waiting = append(o.waiting, msgs...) }

// release returns, appended to out, what may leave now, in order. An
// acknowledgement of an earlier term than the current one has lost its ground:
// its entries may have been replaced since. It leaves as a refusal with the
// current term, once that is durable.
func (o *outbox) release(out []message, durable LSN, term Term, hard LSN) []message {
	kept := o.waiting[:0]
	for _, m := range o.waiting {
		if r := m.appendReply; r != nil && r.Success && m.match > 0 && r.Term < term {
			m.appendReply = &appendReply{Term: term, Wanted: r.Wanted}
			m.match, m.needs = 0, hard
		}
		if m.needs <= durable {
			out = append(out, m)
		} else {
			kept = append(kept, m)
		}
	}
	clear(o.waiting[len(kept):])
	o.waiting = kept
	return out
}

// drop forgets everything: the node stops.
func (o *outbox) drop() { o.waiting = nil }
