package wal

// carry remembers the latest record of each carried kind and group, as of the
// batches written so far.
type carry struct {
	kinds []byte
	index map[carryKey]int // into latest
	// latest is in the order in which the keys first appeared, so that equal
	// logs carry equal bytes.
	latest []Record
}

type carryKey struct {
	kind  byte
	group uint32
}

func newCarry(kinds []byte) carry {
	return carry{kinds: append([]byte(nil), kinds...), index: map[carryKey]int{}}
}

func (c *carry) wants(kind byte) bool {
	for _, k := range c.kinds {
		if k == kind {
			return true
		}
	}
	return false
}

// take notes the records of a body.
func (c *carry) take(body []byte) {
	_ = eachRecord(body, func(_ int, r Record) error {
		if !c.wants(r.Kind) {
			return nil
		}
		key := carryKey{r.Kind, r.Group}
		i, ok := c.index[key]
		if !ok {
			i = len(c.latest)
			c.index[key] = i
			c.latest = append(c.latest, Record{Kind: r.Kind, Group: r.Group})
		}
		c.latest[i].Data = append(c.latest[i].Data[:0], r.Data...)
		return nil
	})
}

// encode returns the carried records as a body, with the checksum of their
// heads.
func (c *carry) encode() (body []byte, heads uint32) {
	for i := range c.latest {
		body, heads = appendRecord(body, heads, &c.latest[i], len(c.latest[i].Data))
	}
	return body, heads
}

// size is how long encode's body is, in bytes.
func (c *carry) size() (n int64) {
	for i := range c.latest {
		n += recordHeadSize + int64(len(c.latest[i].Data))
	}
	return n
}
