package wal

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"example.com/raft/internal/vfs"
)

// FuzzOpen opens a log whose segment files were edited. The input is small, so
// that the fuzzer is fast: it says which log to begin with, whether checksums
// are made right afterwards, so that the fuzzer gets past them, and what is
// edited. Open must not panic, must not change what it refuses, and what it
// accepts must be the same when opened again.
func FuzzOpen(f *testing.F) {
	bases := [][][]byte{fuzzFiles(f, true, 0), fuzzFiles(f, false, 0), fuzzFiles(f, false, 1), fuzzFiles(f, false, 2)}
	for base := range bases {
		f.Add(byte(base), false, []byte{})
		f.Add(byte(base), true, []byte{editSet, 1, 16, 9})
		f.Add(byte(base), true, []byte{editSet | editSecond, 1, 32, 9, editCopy, 2, 1, 0})
		f.Add(byte(base), true, []byte{editCut, 3, 0, 0, editXor, 0, 16, 1})
		f.Add(byte(base), false, []byte{editZero, 1, 0, 0, editCut | editSecond, 0, 0, 0})
	}
	f.Fuzz(func(t *testing.T, base byte, fix bool, edits []byte) {
		fs := newMem(1)
		o := testOptions(fs, 1)
		if err := fs.MkdirAll(o.Dir); err != nil {
			t.Fatal(err)
		}
		for i, p := range edited(bases[int(base)%len(bases)], edits) {
			if fix {
				fixChecksums(p)
			}
			if len(p) > 0 {
				writeAll(t, fs, o.Dir+"/"+fileName(uint64(i+1), segmentSuffix), p)
			}
		}
		k := &kept{}
		same := inspected(o)
		changes := 0
		fs.SetHook(func(op vfs.Op) error {
			if op.Kind.Changes() && op.Kind != vfs.OpSyncDir {
				changes++
			}
			return nil
		})
		l, err := Open(context.Background(), o, k.replay)
		if err := same(k, err); err != nil {
			t.Fatal(err)
		}
		if err != nil {
			checkRefusal(t, err, changes)
			return
		}
		checkReopens(t, l, o, k)
	})
}

// checkRefusal checks how Open refused damaged files.
func checkRefusal(t *testing.T, err error, changes int) {
	t.Helper()
	var ce *CorruptError
	var ve *VersionError
	var te *TagError
	if !errors.As(err, &ce) && !errors.As(err, &ve) && !errors.As(err, &te) {
		t.Fatalf("an untyped error: %v", err)
	}
	if changes > 0 {
		t.Fatalf("%d changes on disk, and then: %v", changes, err)
	}
}

// checkReopens checks that what Open replayed can be read, and is the same
// when opened again.
func checkReopens(t *testing.T, l *Log, o Options, k *kept) {
	t.Helper()
	for i, lsn := range k.lsns {
		if lsn == 0 {
			continue
		}
		if r, err := l.ReadAt(lsn, nil); err != nil || string(r.Data) != string(k.recs[i].Data) {
			t.Fatalf("ReadAt(%d) differs from replay: %v", lsn, err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, again := mustOpen(t, o)
	if len(again.recs) != len(k.recs) {
		t.Fatalf("%d records, and %d when opened again", len(k.recs), len(again.recs))
	}
	for i, r := range again.recs {
		if string(r.Data) != string(k.recs[i].Data) {
			t.Fatalf("record %d differs when opened again", i)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
}

// An edit is four bytes: what to do, with the number of the file in bits 3 and
// 4 and that of a quarter of a kilobyte in the highest three; a block of the
// file; an offset there; and an operand.
const (
	editSet    = iota // a byte becomes the operand
	editXor           // a byte is changed by the operand
	editAdd           // the operand is added to a byte
	editZero          // a sector of 512 bytes becomes zero
	editCopy          // the block becomes a copy of block `offset` of file `operand`
	editCut           // the file ends before the block, or grows to it
	editSwap          // the block changes places with block `offset`
	editCount         // how many there are
	editSecond = 1 << 3
	editThird  = 2 << 3
)

// edited returns copies of files, edited.
func edited(files [][]byte, edits []byte) [][]byte {
	out := make([][]byte, len(files))
	for i, p := range files {
		out[i] = append([]byte(nil), p...)
	}
	for ; len(edits) >= 4; edits = edits[4:] {
		file := int(edits[0]>>3&3) % len(out)
		p := out[file]
		n := len(p) / blockSize
		block, offset, operand := int(edits[1]), int(edits[2]), edits[3]
		if op := int(edits[0]&7) % editCount; op == editCut {
			size := block % 12 * blockSize
			p = append(p, make([]byte, max(0, size-len(p)))...)
			out[file] = p[:size]
		} else if n > 0 {
			edit(op, p[block%n*blockSize:][:blockSize], offset+256*int(edits[0]>>5), operand, p, out[int(operand)%len(out)])
		}
	}
	return out
}

// edit changes one block of a file.
func edit(op int, b []byte, at int, operand byte, file, other []byte) {
	n := len(file) / blockSize
	switch op {
	case editSet:
		b[at] = operand
	case editXor:
		b[at] ^= operand
	case editAdd:
		b[at] += operand
	case editZero:
		clear(b[at/512*512:][:512])
	case editCopy:
		if n = len(other) / blockSize; n > 0 {
			copy(b, other[at%n*blockSize:][:blockSize])
		}
	case editSwap:
		o := file[at%n*blockSize:][:blockSize]
		was := append([]byte(nil), b...)
		copy(b, o)
		copy(o, was)
	}
}

// fuzzFiles are the segment files of a log that was opened again a few times,
// each time after a batch that nothing had proven.
func fuzzFiles(t testing.TB, sealed bool, reopened int) (files [][]byte) {
	fs, o := fuzzLog(t, sealed)
	for range reopened {
		fs.Kill()
		l, _ := mustOpen(t, o)
		l.Append(numbered(len(files), 30))
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	fs.Kill()
	names, err := fs.List(o.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		if n, ok := parseName(name, segmentSuffix); ok {
			if n != uint64(len(files)+1) {
				t.Fatalf("%s is file %d", name, len(files)+1)
			}
			files = append(files, readAll(t, fs, o.Dir+"/"+name))
		}
	}
	return files
}

// fuzzLog is a log of two segments.
func fuzzLog(t testing.TB, sealed bool) (*vfs.Mem, Options) {
	fs := newMem(1)
	o := testOptions(fs, 1)
	l, _ := mustOpen(t, o)
	for n := 0; len(l.segs) < 2; n++ {
		r := numbered(n, 30)
		if n == 0 {
			r.Kind = kindState
		}
		l.Append(r)
		if err := l.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if sealed {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return fs, o
}

// fixChecksums makes the checksums of a segment's headers and records right,
// as far as their structure allows, and gives every batch the segment's salt.
func fixChecksums(p []byte) {
	if len(p) < blockSize {
		return
	}
	copy(p[8:12], le32(checksum(0, p[12:blockSize])))
	h, wrong := decodeSegmentHeader(p)
	if wrong != "" {
		return
	}
	for off := blockSize; off+batchHeaderSize <= len(p); off += blockSize {
		b := p[off:]
		if string(b[:4]) != batchMagic {
			continue
		}
		bh := batchHeader{
			version: b[36], flags: b[37], salt: h.salt,
			seq: u64(b[16:]), prev: link{u64(b[24:]), u32(b[32:])},
			carried: u32(b[40:]), records: u32(b[44:]),
			carriedCRC: u32(b[48:]), recordsCRC: u32(b[52:]),
		}
		if total := int64(bh.carried) + int64(bh.records); total <= int64(len(b)-batchHeaderSize) {
			body := b[batchHeaderSize:][:total]
			bh.carriedCRC = fixRecords(body[:bh.carried])
			bh.recordsCRC = fixRecords(body[bh.carried:])
		}
		bh.encode(b, int64(off))
	}
}

func fixRecords(body []byte) (heads uint32) {
	for len(body) >= recordHeadSize {
		n := u32(body)
		if int64(n) > int64(len(body)-recordHeadSize) {
			break
		}
		end := recordHeadSize + int(n)
		copy(body[4:8], le32(recordChecksum(body, body[recordHeadSize:end])))
		heads = checksum(heads, body[:recordHeadSize])
		body = body[end:]
	}
	return heads
}

func readAll(t testing.TB, fs vfs.FS, name string) []byte {
	f, err := fs.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, size)
	if _, err := f.ReadAt(b, 0); err != nil {
		t.Fatal(err)
	}
	return b
}

func writeAll(t testing.TB, fs vfs.FS, name string, p []byte) {
	f, err := fs.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	_, err = f.WriteAt(p, 0)
	if err := errors.Join(err, f.Sync()); err != nil {
		t.Fatal(err)
	}
}

func u32(b []byte) uint32  { return binary.LittleEndian.Uint32(b) }
func u64(b []byte) uint64  { return binary.LittleEndian.Uint64(b) }
func le32(v uint32) []byte { return binary.LittleEndian.AppendUint32(nil, v) }
