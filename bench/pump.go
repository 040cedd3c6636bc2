package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"syscall"
)

// The pump is the ceiling that the other systems are measured against: the
// least work that makes a payload durable on two of three nodes, without any
// Raft. One goroutine takes everything queued as one batch, sends it to two
// followers and, while they write and sync it, writes and syncs it itself. A
// batch is done when two of the three have synced it. The next batch does not
// wait for that, only for the leader's own sync.
//
// It runs five goroutines: the leader, two followers, and one reader of
// acknowledgements per follower.

const (
	pumpAlign     = 4096       // batches start and end on this boundary, so a sync touches no page of an earlier one
	pumpRegion    = 64 << 20   // bytes of each node's file, zero-filled before the start and then overwritten in place
	pumpMaxBatch  = 4 << 20    // bytes at which a batch is closed and a new one begun
	pumpMaxRecord = 1 << 20    // bytes of the largest payload
	pumpMagic     = 0x706d7031 // marks a batch in the file

	// A batch is a header (magic, CRC32C of all that follows, sequence number,
	// length with header and padding, number of records), then per record its
	// length and payload, then zeros up to the boundary.
	pumpHeader       = 24
	pumpRecordHeader = 4
)

var (
	errPumpStopped = errors.New("the pump is stopped")
	errPumpSize    = fmt.Errorf("the pump takes payloads of at most %d bytes", pumpMaxRecord)
)

// batch is what one sync covers. Its buffer is used again once it is written;
// the rest stays for the clients that wait on it.
type batch struct {
	seq     uint64 // the first is 1
	records uint32
	buf     []byte
	done    chan struct{} // closed when the batch is durable on two nodes, or the pump has failed
	err     error         // read after done
}

type pump struct {
	region int64
	sync   func(node int, f *os.File) error // fdatasync; tests watch it

	mu      sync.Mutex // guards what clients and the leader share
	work    sync.Cond
	queue   []*batch // the last one is being filled
	spare   [][]byte
	nextSeq uint64
	failure error // set once, then every proposal fails with it

	ackMu   sync.Mutex // guards what the leader and the acknowledgement readers share; taken after mu
	durable [3]uint64  // highest sequence number synced by the leader and each follower
	flights []*batch   // sent and not yet durable on two nodes, in order

	files []*os.File
	conns []net.Conn // the leader's two ends, then the followers'
	wg    sync.WaitGroup
}

func newPump(region int64) *pump {
	p := &pump{
		region: region,
		sync:   func(_ int, f *os.File) error { return fdatasync(f) },
	}
	p.work.L = &p.mu
	return p
}

func fdatasync(f *os.File) error {
	for {
		err := syscall.Fdatasync(int(f.Fd()))
		if err != syscall.EINTR {
			return err
		}
	}
}

func (p *pump) Start(dir string) error {
	for i := range 3 {
		f, err := zeroFilled(pumpFile(dir, i), p.region)
		if err != nil {
			return errors.Join(err, p.Stop())
		}
		p.files = append(p.files, f)
	}
	var leaderEnds, followerEnds []net.Conn
	for range 2 {
		l, f, err := tcpPair()
		if err != nil {
			return errors.Join(err, p.Stop())
		}
		leaderEnds, followerEnds = append(leaderEnds, l), append(followerEnds, f)
		p.conns = append(p.conns, l, f)
	}
	p.wg.Go(func() { p.runLeader(leaderEnds) })
	for i := range 2 {
		p.wg.Go(func() { p.runAcks(i+1, leaderEnds[i]) })
		p.wg.Go(func() { p.runFollower(i+1, followerEnds[i]) })
	}
	return nil
}

func pumpFile(dir string, node int) string {
	return filepath.Join(dir, fmt.Sprintf("node%d", node), "log")
}

// zeroFilled creates a file of size bytes of written zeros. Syncing a later
// overwrite then changes no metadata: no block is allocated, no extent
// converted, no length changed.
func zeroFilled(name string, size int64) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return nil, err
	}
	zeros := make([]byte, min(size, 1<<20))
	for off := int64(0); off < size && err == nil; off += int64(len(zeros)) {
		_, err = f.WriteAt(zeros[:min(int64(len(zeros)), size-off)], off)
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = syncDir(filepath.Dir(name))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("preparing %s: %w; is there room for %d bytes?", name, err, size), f.Close())
	}
	return f, nil
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// tcpPair returns the two ends of one connection over loopback.
func tcpPair() (dialled, accepted net.Conn, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	// The kernel completes the handshake on behalf of the listener, so dialling
	// first and accepting second on one goroutine does not block.
	dialled, err = net.Dial("tcp", l.Addr().String())
	if err != nil {
		return nil, nil, err
	}
	accepted, err = l.Accept()
	if err != nil {
		return nil, nil, errors.Join(err, dialled.Close())
	}
	return dialled, accepted, nil
}

func (p *pump) Propose(ctx context.Context, payload []byte) error {
	if len(payload) > pumpMaxRecord {
		return errPumpSize
	}
	p.mu.Lock()
	if p.failure != nil {
		p.mu.Unlock()
		return p.failure
	}
	b := p.enqueue(payload)
	p.mu.Unlock()

	// A plain receive costs less than a select.
	if ctx.Done() == nil {
		<-b.done
		return b.err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enqueue copies payload to the end of the last queued batch. The caller holds mu.
func (p *pump) enqueue(payload []byte) *batch {
	var b *batch
	if n := len(p.queue); n > 0 && len(p.queue[n-1].buf)+pumpRecordHeader+len(payload) <= pumpMaxBatch {
		b = p.queue[n-1]
	} else {
		p.nextSeq++
		b = &batch{seq: p.nextSeq, done: make(chan struct{})}
		if n := len(p.spare); n > 0 {
			b.buf, p.spare = p.spare[n-1], p.spare[:n-1]
		}
		b.buf = append(b.buf[:0], make([]byte, pumpHeader)...)
		p.queue = append(p.queue, b)
		if n == 0 {
			p.work.Signal()
		}
	}
	b.buf = binary.LittleEndian.AppendUint32(b.buf, uint32(len(payload)))
	b.buf = append(b.buf, payload...)
	b.records++
	return b
}

// take waits for a queued batch and moves it into flight; ok is false once the
// pump has failed. Both locks are held for the move, so fail finds every
// unfinished batch in one place or the other. spare is the buffer of the batch
// before, to be used again.
func (p *pump) take(spare []byte) (b *batch, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if spare != nil {
		p.spare = append(p.spare, spare)
	}
	for len(p.queue) == 0 && p.failure == nil {
		p.work.Wait()
	}
	if p.failure != nil {
		return nil, false
	}
	b = p.queue[0]
	n := copy(p.queue, p.queue[1:])
	p.queue[n] = nil
	p.queue = p.queue[:n]
	p.ackMu.Lock()
	p.flights = append(p.flights, b)
	p.ackMu.Unlock()
	return b, true
}

func (p *pump) runLeader(followers []net.Conn) {
	file := pumpWriter{pump: p, node: 0, f: p.files[0]}
	var spare []byte
	for {
		b, ok := p.take(spare)
		if !ok {
			return
		}
		seal(b)
		for _, c := range followers {
			if _, err := c.Write(b.buf); err != nil {
				p.fail(fmt.Errorf("sending to a follower: %w", err))
				return
			}
		}
		if err := file.write(b.buf); err != nil {
			p.fail(err)
			return
		}
		p.acknowledge(0, b.seq)
		spare = b.buf
	}
}

// seal pads the batch to the boundary and fills its header in.
func seal(b *batch) {
	if rest := len(b.buf) % pumpAlign; rest != 0 {
		b.buf = append(b.buf, make([]byte, pumpAlign-rest)...)
	}
	h := b.buf[:pumpHeader]
	binary.LittleEndian.PutUint32(h[0:], pumpMagic)
	binary.LittleEndian.PutUint64(h[8:], b.seq)
	binary.LittleEndian.PutUint32(h[16:], uint32(len(b.buf)))
	binary.LittleEndian.PutUint32(h[20:], b.records)
	binary.LittleEndian.PutUint32(h[4:], crc32.Checksum(b.buf[8:], crc32.MakeTable(crc32.Castagnoli)))
}

// unseal returns the sequence number and length of the batch at the start of
// buf. ok is false when buf holds only a part of it.
func unseal(buf []byte) (seq uint64, length int, ok bool, err error) {
	if len(buf) < pumpHeader {
		return 0, 0, false, nil
	}
	if binary.LittleEndian.Uint32(buf) != pumpMagic {
		return 0, 0, false, errors.New("no batch where one should start")
	}
	length = int(binary.LittleEndian.Uint32(buf[16:]))
	if length < pumpHeader || length > pumpMaxBatch+pumpMaxRecord+2*pumpAlign || length%pumpAlign != 0 {
		return 0, 0, false, fmt.Errorf("a batch of %d bytes is not possible", length)
	}
	if len(buf) < length {
		return 0, length, false, nil
	}
	if crc32.Checksum(buf[8:length], crc32.MakeTable(crc32.Castagnoli)) != binary.LittleEndian.Uint32(buf[4:]) {
		return 0, 0, false, errors.New("checksum mismatch in a batch")
	}
	return binary.LittleEndian.Uint64(buf[8:]), length, true, nil
}

// pumpWriter appends batches to a node's file, from its start again when the
// end is reached, and syncs.
type pumpWriter struct {
	pump *pump
	node int
	f    *os.File
	off  int64
}

func (w *pumpWriter) write(b []byte) error {
	if w.off+int64(len(b)) > w.pump.region {
		w.off = 0
	}
	if _, err := w.f.WriteAt(b, w.off); err != nil {
		return fmt.Errorf("node %d: %w", w.node, err)
	}
	if err := w.pump.sync(w.node, w.f); err != nil {
		return fmt.Errorf("node %d: fdatasync %s: %w", w.node, w.f.Name(), err)
	}
	w.off += int64(len(b))
	return nil
}

// runFollower writes and syncs what has arrived, all complete batches at once,
// and acknowledges the last of them.
func (p *pump) runFollower(node int, leader net.Conn) {
	file := pumpWriter{pump: p, node: node, f: p.files[node]}
	buf := make([]byte, 2*(pumpMaxBatch+pumpMaxRecord))
	var ack [8]byte
	have := 0
	for {
		n, err := leader.Read(buf[have:])
		if err != nil {
			p.fail(fmt.Errorf("node %d: reading from the leader: %w", node, err))
			return
		}
		have += n
		var seq uint64
		whole := 0
		for {
			s, length, ok, err := unseal(buf[whole:have])
			if err != nil {
				p.fail(fmt.Errorf("node %d: %w", node, err))
				return
			}
			if !ok {
				break
			}
			seq = s
			whole += length
		}
		if whole == 0 {
			continue
		}
		if err := file.write(buf[:whole]); err != nil {
			p.fail(err)
			return
		}
		binary.LittleEndian.PutUint64(ack[:], seq)
		if _, err := leader.Write(ack[:]); err != nil {
			p.fail(fmt.Errorf("node %d: acknowledging: %w", node, err))
			return
		}
		have = copy(buf, buf[whole:have])
	}
}

func (p *pump) runAcks(node int, follower net.Conn) {
	var ack [8]byte
	for {
		if _, err := io.ReadFull(follower, ack[:]); err != nil {
			p.fail(fmt.Errorf("reading acknowledgements of node %d: %w", node, err))
			return
		}
		p.acknowledge(node, binary.LittleEndian.Uint64(ack[:]))
	}
}

// acknowledge notes that node has synced everything up to seq and wakes the
// clients whose batches two nodes have now.
func (p *pump) acknowledge(node int, seq uint64) {
	p.ackMu.Lock()
	p.durable[node] = seq
	two := secondHighest(p.durable)
	n := 0
	for n < len(p.flights) && p.flights[n].seq <= two {
		close(p.flights[n].done)
		n++
	}
	rest := copy(p.flights, p.flights[n:])
	clear(p.flights[rest:])
	p.flights = p.flights[:rest]
	p.ackMu.Unlock()
}

// secondHighest returns the highest value that two of the three have reached.
func secondHighest(d [3]uint64) uint64 {
	return max(min(d[0], d[1]), min(d[0], d[2]), min(d[1], d[2]))
}

// Check has nothing to look at: an acknowledgement is the pump's only state.
func (p *pump) Check(int64, int) error { return nil }

// fail stops the pump: every waiting and later proposal returns the first
// failure. What is in flight may be durable or not, as after any lost leader.
func (p *pump) fail(err error) {
	p.mu.Lock()
	if p.failure == nil {
		p.failure = err
	}
	err = p.failure
	queue := p.queue
	p.queue = nil
	p.work.Broadcast()
	p.mu.Unlock()

	p.ackMu.Lock()
	flights := p.flights
	p.flights = nil
	p.ackMu.Unlock()
	for _, b := range append(flights, queue...) {
		b.err = err
		close(b.done)
	}
	for _, c := range p.conns {
		c.Close() // Unblocks the other goroutines; Stop has nothing left to report about it.
	}
}

// Stop returns the failure that stopped the pump before, if there was one.
func (p *pump) Stop() error {
	p.fail(errPumpStopped)
	p.wg.Wait()
	var err error
	if p.failure != errPumpStopped {
		err = p.failure
	}
	for _, f := range p.files {
		err = errors.Join(err, f.Close())
	}
	p.files = nil
	return err
}
