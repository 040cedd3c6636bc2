package vfs

import "math/bits"

const (
	sectorSize     = 512
	pageSize       = 4096
	sectorsPerPage = pageSize / sectorSize
)

// page is a page of a file. A page that disk refers to is never changed in
// place, so that copies of a file system share pages. A nil page is zeros.
type page [pageSize]byte

var zeroPage page // never written

// memNode is a file or a directory: what is seen (the cache) beside what a
// power cut leaves (the disk).
type memNode struct {
	ino uint64
	dir bool

	live, disk map[string]*memNode // of a directory
	pending    []dirOp             // changes in live that are not in disk, in order

	pages, diskPages []*page
	dirty            []uint8 // per page of pages, one bit per sector written and not synced
	size, diskSize   int64
}

// dirOp is one change of a directory.
type dirOp struct {
	kind     OpKind // OpCreate, OpRemove or OpRename
	name, to string
	node     *memNode
}

// apply changes entries, unless an earlier change that was lost has taken away
// what this one builds on.
func (op dirOp) apply(entries map[string]*memNode) {
	switch op.kind {
	case OpCreate:
		entries[op.name] = op.node
	case OpRemove:
		if entries[op.name] == op.node {
			delete(entries, op.name)
		}
	case OpRename:
		if entries[op.name] == op.node {
			delete(entries, op.name)
			entries[op.to] = op.node
		}
	}
}

func (n *memNode) change(op dirOp) {
	op.apply(n.live)
	n.pending = append(n.pending, op)
}

func at(pages []*page, i int) *page {
	if i < len(pages) && pages[i] != nil {
		return pages[i]
	}
	return &zeroPage
}

func (n *memNode) readAt(pages []*page, p []byte, off int64) {
	for len(p) > 0 {
		k := copy(p, at(pages, int(off/pageSize))[off%pageSize:])
		p, off = p[k:], off+int64(k)
	}
}

// writeAt writes within the size.
func (n *memNode) writeAt(p []byte, off int64) {
	for len(p) > 0 {
		i, in := int(off/pageSize), int(off%pageSize)
		k := min(len(p), pageSize-in)
		if n.pages[i] != nil || !isZero(p[:k]) {
			copy(n.own(i)[in:], p[:k])
		}
		n.markDirty(i, in, in+k)
		p, off = p[k:], off+int64(k)
	}
}

// own makes page i one that may be changed in place, and returns it.
func (n *memNode) own(i int) *page {
	if n.pages[i] == nil || i < len(n.diskPages) && n.pages[i] == n.diskPages[i] {
		c := *at(n.pages, i)
		n.pages[i] = &c
	}
	return n.pages[i]
}

func (n *memNode) markDirty(i, from, to int) {
	for s := from / sectorSize; s*sectorSize < to; s++ {
		n.dirty[i] |= 1 << s
	}
}

// setSize cuts or extends the file. Bytes that come back read as zero.
func (n *memNode) setSize(size int64) {
	count := int((size + pageSize - 1) / pageSize)
	if size < n.size {
		if in := int(size % pageSize); in != 0 {
			clear(n.own(count - 1)[in:])
			n.markDirty(count-1, in, pageSize)
		}
		n.pages, n.dirty = n.pages[:count], n.dirty[:count]
	}
	for old := len(n.pages); old < count; old++ {
		n.pages = append(n.pages, nil)
		n.dirty = append(n.dirty, 0)
		if old < len(n.diskPages) { // what a cut left on disk is to become zero
			n.dirty[old] = 0xff
		}
	}
	n.size = size
}

// sync cleans every dirty sector, and writes those to disk that keep agrees to.
func (n *memNode) sync(keep func() bool) {
	if keep() || n.size == n.diskSize {
		n.diskSize = n.size
	}
	for len(n.diskPages) < len(n.pages) {
		n.diskPages = append(n.diskPages, nil)
	}
	if n.diskSize == n.size {
		n.diskPages = n.diskPages[:len(n.pages)]
	}
	for i, d := range n.dirty {
		if d == 0 {
			continue
		}
		var kept uint8
		for s := range sectorsPerPage {
			if d&(1<<s) != 0 && keep() {
				kept |= 1 << s
			}
		}
		n.dirty[i] = 0
		switch kept {
		case 0:
		case d:
			if n.sameOutside(i, d) {
				n.diskPages[i] = n.pages[i]
				continue
			}
			fallthrough
		default:
			merged := *at(n.diskPages, i)
			for s := range sectorsPerPage {
				if kept&(1<<s) != 0 {
					copy(merged[s*sectorSize:][:sectorSize], at(n.pages, i)[s*sectorSize:])
				}
			}
			n.diskPages[i] = &merged
		}
	}
}

// sameOutside reports whether page i is alike in cache and on disk but for the
// sectors in mask. It is not after a sync of it has failed.
func (n *memNode) sameOutside(i int, mask uint8) bool {
	if bits.OnesCount8(mask) == sectorsPerPage {
		return true
	}
	a, b := at(n.pages, i), at(n.diskPages, i)
	for s := range sectorsPerPage {
		if mask&(1<<s) == 0 && [sectorSize]byte(a[s*sectorSize:]) != [sectorSize]byte(b[s*sectorSize:]) {
			return false
		}
	}
	return true
}

func isZero(p []byte) bool {
	for len(p) > 0 {
		k := min(len(p), pageSize)
		if string(p[:k]) != string(zeroPage[:k]) {
			return false
		}
		p = p[k:]
	}
	return true
}
