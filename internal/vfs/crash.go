package vfs

import (
	"io/fs"
	"math/rand/v2"
)

// CrashClone returns the file system as the next boot finds it if the power
// fails now. m itself is unchanged, so that many crashes can be tried from one
// point.
//
// Synced content and synced directory entries are kept. Each unsynced change
// of a directory is kept or lost, each unsynced sector is old, new, garbage or
// torn, a size that was not synced is old, new or between, all independently:
// choose(n), which returns a number in [0, n), decides. A seeded rand's IntN
// serves, and so does a counter that enumerates all outcomes: with choose
// always 0 everything unsynced is lost, with n-1 of 2 and 1 of 4 kept.
//
// The clone has no hook, no capacity limit, and dice that depend only on m's.
func (m *Mem) CrashClone(choose func(n int) int) *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Mem{
		rng:     rand.New(rand.NewPCG(m.garbage, uint64(m.epoch))),
		garbage: mix(m.garbage + 1),
		nextIno: m.nextIno,
		locks:   map[string]bool{},
	}
	c.root = m.crashNode(m.root, choose, c)
	return c
}

// Crash cuts the power of m itself: it becomes what CrashClone would return,
// but keeps its hook, its capacity and its dice. Every handle that is open
// fails from now on with ErrGone.
func (m *Mem) Crash(choose func(n int) int) {
	c := m.CrashClone(choose)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.root, m.used, m.garbage = c.root, c.used, c.garbage
	m.killed()
}

// Kill ends the process that uses m, and not the machine: handles fail with
// ErrGone, locks are released, the page cache stays.
func (m *Mem) Kill() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.killed()
}

func (m *Mem) killed() {
	m.epoch++
	m.open = 0
	clear(m.locks)
}

// crashNode copies a node as a power cut leaves it.
func (m *Mem) crashNode(n *memNode, choose func(int) int, into *Mem) *memNode {
	if !n.dir {
		return m.crashFile(n, choose, into)
	}
	left := make(map[string]*memNode, len(n.disk))
	for name, child := range n.disk {
		left[name] = child
	}
	for _, op := range n.pending {
		if choose(2) == 1 {
			op.apply(left)
		}
	}
	c := &memNode{ino: n.ino, dir: true, live: map[string]*memNode{}, disk: map[string]*memNode{}}
	for _, name := range sortedNames(left) {
		child := m.crashNode(left[name], choose, into)
		c.live[name], c.disk[name] = child, child
	}
	return c
}

func (m *Mem) crashFile(n *memNode, choose func(int) int, into *Mem) *memNode {
	size := n.diskSize
	if n.size != n.diskSize {
		switch choose(3) {
		case 1:
			size = n.size
		case 2:
			size = (n.size + n.diskSize) / 2 / sectorSize * sectorSize
		}
	}
	count := int((size + pageSize - 1) / pageSize)
	c := &memNode{ino: n.ino, size: size, diskSize: size, diskPages: make([]*page, count), dirty: make([]uint8, count)}
	copy(c.diskPages, n.diskPages)
	for i := 0; i < count && i < len(n.dirty); i++ {
		if n.dirty[i] != 0 {
			m.crashPage(c, n, i, choose)
		}
	}
	if in := int(size % pageSize); in != 0 && c.diskPages[count-1] != nil {
		p := *c.diskPages[count-1]
		clear(p[in:])
		c.diskPages[count-1] = &p
	}
	c.pages = append([]*page(nil), c.diskPages...)
	into.used += size
	return c
}

// crashPage decides each dirty sector of page i.
func (m *Mem) crashPage(c, n *memNode, i int, choose func(int) int) {
	var p *page // the result, copied only if something differs from disk
	fresh, old := at(n.pages, i), at(n.diskPages, i)
	for s := range sectorsPerPage {
		if n.dirty[i]&(1<<s) == 0 {
			continue
		}
		var sector [sectorSize]byte
		lo, hi := s*sectorSize, (s+1)*sectorSize
		seed := mix(m.garbage ^ n.ino<<32 ^ uint64(i*sectorsPerPage+s))
		switch choose(4) {
		case 0:
			continue
		case 1:
			copy(sector[:], fresh[lo:hi])
		case 2:
			for k := range sector {
				sector[k] = byte(mix(seed+uint64(k)) >> 32)
			}
		case 3:
			cut := 1 + int(seed>>8%(sectorSize-1))
			a, b := fresh, old
			if seed&1 == 1 {
				a, b = old, fresh
			}
			copy(sector[:cut], a[lo:hi])
			copy(sector[cut:], b[lo+cut:hi])
		}
		if p == nil {
			if [sectorSize]byte(old[lo:hi]) == sector {
				continue
			}
			q := *old
			p = &q
		}
		copy(p[lo:hi], sector[:])
	}
	if p != nil {
		c.diskPages[i] = p
	}
}

// mix is the finalizer of splitmix64: it spreads a seed over all bits.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// DropCaches forgets every cached page that is clean, as a system short of
// memory does: after a failed sync, reads then return what is on disk.
func (m *Mem) DropCaches() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.root.each(func(n *memNode) {
		for i, d := range n.dirty {
			if d == 0 {
				n.pages[i] = nil
				if i < len(n.diskPages) {
					n.pages[i] = n.diskPages[i]
				}
			}
		}
	})
}

// each calls f for every file that can be seen below a directory.
func (n *memNode) each(f func(*memNode)) {
	if !n.dir {
		f(n)
		return
	}
	for _, name := range sortedNames(n.live) {
		n.live[name].each(f)
	}
}

// FlipBit turns over one bit of a file, in the cache and on disk, as rot does:
// bit 0 is the lowest bit of the byte at off.
func (m *Mem) FlipBit(name string, off int64, bit uint) error {
	return m.damage(name, off, func(p []byte) { p[0] ^= 1 << (bit % 8) })
}

// ZeroSector clears the 512-byte sector that holds offset off, likewise.
func (m *Mem) ZeroSector(name string, off int64) error {
	return m.damage(name, off/sectorSize*sectorSize, func(p []byte) { clear(p[:sectorSize]) })
}

func (m *Mem) damage(name string, off int64, f func([]byte)) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := m.walk(name)
	if n == nil || n.dir || off >= n.size {
		return pathError(OpWrite, name, fs.ErrNotExist)
	}
	i, in := int(off/pageSize), int(off%pageSize)
	shared := i < len(n.diskPages) && n.pages[i] == n.diskPages[i]
	if i < len(n.diskPages) {
		q := *at(n.diskPages, i)
		f(q[in:])
		n.diskPages[i] = &q
		if shared {
			n.pages[i] = &q
			return nil
		}
	}
	q := *at(n.pages, i)
	f(q[in:])
	n.pages[i] = &q
	return nil
}

// Clone returns a copy of the file system as it is, cache and disk, as a
// process that starts next finds it. The copy has no hook.
func (m *Mem) Clone() *Mem {
	m.mu.Lock()
	defer m.mu.Unlock()
	c := &Mem{
		rng:     rand.New(rand.NewPCG(m.garbage, uint64(m.epoch))),
		garbage: m.garbage,
		nextIno: m.nextIno, capacity: m.capacity, used: m.used,
		locks: map[string]bool{},
	}
	c.root = m.root.clone(map[*memNode]*memNode{})
	return c
}

func (n *memNode) clone(done map[*memNode]*memNode) *memNode {
	if n == nil || done[n] != nil {
		return done[n]
	}
	c := &memNode{ino: n.ino, dir: n.dir, size: n.size, diskSize: n.diskSize}
	done[n] = c
	c.diskPages = append(c.diskPages, n.diskPages...)
	c.dirty = append(c.dirty, n.dirty...)
	for i, p := range n.pages {
		if p != nil && (i >= len(n.diskPages) || p != n.diskPages[i]) {
			q := *p
			p = &q
		}
		c.pages = append(c.pages, p)
	}
	if !n.dir {
		return c
	}
	c.live, c.disk = map[string]*memNode{}, map[string]*memNode{}
	for _, name := range sortedNames(n.live) {
		c.live[name] = n.live[name].clone(done)
	}
	for _, name := range sortedNames(n.disk) {
		c.disk[name] = n.disk[name].clone(done)
	}
	for _, op := range n.pending {
		op.node = op.node.clone(done)
		c.pending = append(c.pending, op)
	}
	return c
}
